# SPDX-License-Identifier: Apache-2.0

from collections import deque

import pytest

from alphagrpo_ext.printable import printable, printable_parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2Ja\x07", " [2Ja "),
        ("a\x9b31mb\x7f", "a 31mb "),
        ("all\r\n1\u20282\x853", "all  1 2 3"),
        # What follows would be written from right to left.
        ("a\u202eb\u2066c", "a b c"),
        ("half of a pair \ud83d", "half of a pair  "),
        ("ein Käfer 🐈\u3000日本語\u00a0%", "ein Käfer 🐈\u3000日本語\u00a0%"),
        ("👩\u200d🎨 می\u200cخواهم", "👩\u200d🎨 می\u200cخواهم"),
    ],
)
def test_what_steers_a_terminal_is_replaced(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_texts_in_messages_keep_their_lines() -> None:
    image = object()
    messages = [{"role": "user", "content": [{"type": "text", "text": "a\nb\x1bc"}, {"image": image}]}, 0.5, None]
    expected = [{"role": "user", "content": [{"type": "text", "text": "a\nb c"}, {"image": image}]}, 0.5, None]
    assert printable_parts(deque(messages)) == expected

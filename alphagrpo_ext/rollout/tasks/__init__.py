# SPDX-License-Identifier: Apache-2.0

"""The tasks that ship with the package, one file each. A task registers with `@TASKS.register("name")`."""

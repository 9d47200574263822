#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0

# Self-reflection with OpenRLHF. A vision-language model plans an image, looks at the image that the reward server paints, and says
# what is wrong. Its reward is that of the refined image. On one node with 8 GPUs:
#
#   bash recipes/openrlhf_reflection.sh
#
# Every setting below is an environment variable. Further flags of OpenRLHF on the command line override the flags below. The
# settings of the plug-in (ALPHAGRPO_...) are listed in alphagrpo_ext/openrlhf/environment.py. Without ALPHAGRPO_SERVER_URL the
# script starts a reward server with the packaged shapes world, to show that everything works. For real images, start a server
# with a real painter and judge, e.g. on a node of its own, and set ALPHAGRPO_SERVER_URL and PROMPTS.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Ray's workers inherit the variable, so they find the package even if it is not installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen3-VL-8B-Instruct}
PROMPTS=${PROMPTS:-}                      # prompts with questions, as JSON lines; empty: those of the shapes world
OUTPUT_DIR=${OUTPUT_DIR:-runs/openrlhf_reflection}
NUM_GPUS=${NUM_GPUS:-8}
GROUP_SIZE=${GROUP_SIZE:-14}
PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-32}
MAX_LEN=${MAX_LEN:-4096}                  # prompt, thoughts, reflections and images, in tokens
LEARNING_RATE=${LEARNING_RATE:-1e-6}
SERVER_PORT=${SERVER_PORT:-8001}
SERVER_FLAGS=${SERVER_FLAGS:---judge shapes --painter policy}
SERVER_DEADLINE=${SERVER_DEADLINE:-600}   # seconds until the server must be ready
export ALPHAGRPO_NUM_REFLECTION_ROUNDS=${ALPHAGRPO_NUM_REFLECTION_ROUNDS:-1}
export ALPHAGRPO_POLICY_SEES_IMAGES=${ALPHAGRPO_POLICY_SEES_IMAGES:-true}

mkdir -p "$OUTPUT_DIR"

# The reward server paints and judges. It is stopped when this script ends.
if [[ -z ${ALPHAGRPO_SERVER_URL:-} ]]; then
    export ALPHAGRPO_SERVER_URL="http://127.0.0.1:$SERVER_PORT"
    # Unquoted, so that the shell splits it into flags.
    # shellcheck disable=SC2086
    "$PYTHON" -m reward_models.server $SERVER_FLAGS --port "$SERVER_PORT" > "$OUTPUT_DIR/server.log" 2>&1 &
    server=$!
    trap 'kill "$server" 2> /dev/null && wait "$server" || true' EXIT
    until "$PYTHON" -c "import urllib.request as u; u.urlopen('$ALPHAGRPO_SERVER_URL/health', timeout=5)" 2> /dev/null; do
        if ! kill -0 "$server" 2> /dev/null || ((SECONDS > SERVER_DEADLINE)); then
            echo "the reward server did not start; see $OUTPUT_DIR/server.log" >&2
            exit 1
        fi
        sleep 1
    done
fi

# The dataset: requests to the policy, and labels with the questions by which the server scores.
"$PYTHON" recipes/openrlhf_prompts.py --output_dir "$OUTPUT_DIR" ${PROMPTS:+--prompt_file "$PROMPTS"}

# The agent and its dataset.
flags=(
    --train.agent_func_path alphagrpo_ext/openrlhf/agent_file.py
    --data.prompt_dataset "$OUTPUT_DIR/prompts.jsonl"
    --data.input_key prompt
    --data.label_key label
    --data.apply_chat_template
    --data.max_len "$MAX_LEN"
)

# One image per round of reflection. The vision tower is frozen.
case "${ALPHAGRPO_POLICY_SEES_IMAGES,,}" in
    true | 1 | yes)
        flags+=(
            --data.max_images_per_prompt "$ALPHAGRPO_NUM_REFLECTION_ROUNDS"
            --actor.freeze_visual_encoder
        )
        ;;
esac

# Rollouts: groups of one prompt, sampled on-policy. --rollout.max_new_tokens only reserves room for answers when a prompt is too
# long. The length of a turn is limited by ALPHAGRPO_MAX_NEW_TOKENS and --data.max_len.
flags+=(
    --rollout.batch_size "$PROMPTS_PER_STEP"
    --rollout.n_samples_per_prompt "$GROUP_SIZE"
    --rollout.micro_batch_size 4
    --rollout.max_new_tokens 512
    --rollout.temperature 1.0
    --rollout.top_p 1.0
)

# GRPO with sequence-level ratios, one update per step and no reference model.
flags+=(
    --algo.advantage.estimator group_norm
    --algo.kl.init_coef 0
    --actor.policy_loss_type gspo
    --actor.eps_clip_low_high 0.2 0.28
    --train.batch_size "$((PROMPTS_PER_STEP * GROUP_SIZE))"
    --train.micro_batch_size 1
    --train.num_episodes 1
)

# The model, its optimizer, checkpoints and logs.
flags+=(
    --actor.model_name_or_path "$MODEL"
    --actor.adam.lr "$LEARNING_RATE"
    --actor.lr_warmup_ratio 0.03
    --actor.gradient_checkpointing_enable
    --ckpt.output_dir "$OUTPUT_DIR/model"
    --ckpt.path "$OUTPUT_DIR/checkpoints"
    --ckpt.save_steps 50
    --ckpt.save_hf
    --logger.logging_steps 1
    --logger.tensorboard_dir "$OUTPUT_DIR/tensorboard"
)

# Training and generation alternate on all GPUs. Packing is off, because it does not support images.
flags+=(
    --train.colocate_all
    --actor.num_nodes 1
    --actor.num_gpus_per_node "$NUM_GPUS"
    --ref.num_nodes 1
    --ref.num_gpus_per_node "$NUM_GPUS"
    --vllm.num_engines "$NUM_GPUS"
    --vllm.tensor_parallel_size 1
    --vllm.gpu_memory_utilization 0.6
    --vllm.sync_backend nccl
    --vllm.enable_sleep
    --ds.enable_sleep
    --ds.zero_stage 3
    --ds.param_dtype bf16
    --ds.attn_implementation flash_attention_2
)

"$PYTHON" -m openrlhf.cli.train_ppo_ray "${flags[@]}" "$@"

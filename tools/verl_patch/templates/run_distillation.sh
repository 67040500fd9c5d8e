#!/usr/bin/env bash
# On-policy distillation alone: reverse KL to one teacher, over the whole vocabulary.
set -euo pipefail

tree=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} # this tree, before another verl that is installed

STUDENT=${STUDENT:-Qwen/Qwen2.5-0.5B-Instruct}
TEACHER=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}
GPUS=${GPUS:-1}
loss=actor_rollout_ref.actor.policy_loss

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=128 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    actor_rollout_ref.model.path="$STUDENT" \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    "$loss.loss_mode=on_policy_distillation" \
    "$loss.opd.teacher.model=$TEACHER" \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.rollout.n=1 \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    "trainer.logger=[console]" \
    trainer.project_name=on_policy_distillation \
    trainer.experiment_name=reverse_kl \
    "$@"

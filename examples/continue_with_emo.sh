#!/usr/bin/env bash
# Goes on from a Megatron checkpoint with EMO for a short while, its cost matrix fixed: the
# checkpoint's own output layer.
#
#     TP=2 examples/continue_with_emo.sh CHECKPOINT OUT --data-path DATA --train-iters 100 [FLAGS]
#
# Weights and architecture come from CHECKPOINT (torch_dist), the optimizer begins anew; OUT gets
# checkpoints and TensorBoard files. The same command again, after a kill, resumes from the last
# checkpoint in OUT. The learning rate is that of the authors' continual training (arXiv
# 2310.04691); any flag of Megatron may follow and holds over those below, such as --mile-emo-mode
# alone, --mile-emo-cost another_model/ or, without a GPU, --mile-cpu.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
checkpoint=$1 out=$2
shift 2
if [ ! -d "$checkpoint" ] || [ "$checkpoint" -ef "$out" ]; then
  echo "$0: CHECKPOINT is $checkpoint and OUT $out; expected a folder and another one" >&2
  exit 2
fi
start=(--load "$checkpoint" --finetune)
[ ! -f "$out/latest_checkpointed_iteration.txt" ] || start=(--load "$out")
exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${TP:-1}" \
  --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --local-addr 127.0.0.1 \
  "$(dirname "$0")/pretrain_gpt.py" --tensor-model-parallel-size "${TP:-1}" \
  "${start[@]}" --use-checkpoint-args --save "$out" --tensorboard-dir "$out" \
  --ckpt-format torch_dist --mile-objective emo --mile-emo-mode 1 --mile-emo-cost "$checkpoint" \
  --lr 2e-5 --lr-decay-style cosine --lr-warmup-fraction 0.03 --log-interval 1 --eval-iters 0 \
  --eval-interval 1000 --save-interval 1000 "$@"

#!/usr/bin/env bash
# The 1.2B model of the MiLe paper: 1204.9M parameters, 1,048,576 tokens a step; see --help.
set -euo pipefail

MODEL=(
    --num-layers 16 --hidden-size 2048 --num-attention-heads 8 --ffn-hidden-size 8192
    --seq-length 1024 --max-position-embeddings 1024
    # 32 * TP divides the paper's 32000 for every TP of 1, 2, 4 and 8: no padding columns.
    --vocab-size 32000 --make-vocab-size-divisible-by 32
    --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.01
)
# The authors' 200,000 micro-steps of 512 sequences, two of them a step.
SCHEDULE=(
    --global-batch-size 1024 --train-iters 100000 --lr-warmup-iters 1000
    --lr 3e-4 --min-lr 0 --lr-decay-style cosine
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 111
    --save-interval 500 --eval-interval 2500 --eval-iters 10
)
export MICRO_BATCH=${MICRO_BATCH:-16}

exec "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" 1.2b "${MODEL[@]}" "${SCHEDULE[@]}" "$@"

#!/usr/bin/env bash
# The 6.7B model of the MiLe paper: 6738.4M parameters, 4,194,304 tokens a step; see --help.
set -euo pipefail

MODEL=(
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11008
    --seq-length 2048 --max-position-embeddings 2048
    # 32 * TP divides the paper's 32000 for every TP of 1, 2, 4 and 8: no padding columns.
    --vocab-size 32000 --make-vocab-size-divisible-by 32
    --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.01
)
# The authors' 25,000 steps of 2048 sequences; they recomputed activations.
SCHEDULE=(
    --global-batch-size 2048 --train-iters 25000 --lr-warmup-iters 2000
    --lr 3e-4 --min-lr 0 --lr-decay-style cosine
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --seed 111
    --save-interval 1000 --eval-interval 5000 --eval-iters 10
)
export MICRO_BATCH=${MICRO_BATCH:-4} TP=${TP:-2}

exec "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" 6.7b "${MODEL[@]}" "${SCHEDULE[@]}" "$@"

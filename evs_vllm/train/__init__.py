# SPDX-License-Identifier: Apache-2.0
"""Uptraining: continued training with a pruning rate drawn anew for every mini-batch (arXiv 2510.14624).

The paper's claim: a model trained so keeps its accuracy at rates at which an untouched one loses some. The recipe is
Hugging Face's Trainer around a model that `evs_vllm.hf` lets prune: ``evs-vllm uptrain --config FILE.yaml``. Needs the
extra ``train`` (``pip install 'evs-vllm[train]'``).
"""

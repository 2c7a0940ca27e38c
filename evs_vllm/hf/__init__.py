# SPDX-License-Identifier: Apache-2.0
"""EVS for plain transformers models: `enable` prunes inside ``forward`` and ``generate()``, `disable` undoes it.

>>> model = Qwen2_5_VLForConditionalGeneration.from_pretrained(...)
>>> evs_vllm.hf.enable(model, rate=0.75, processor=processor)
>>> inputs = processor(text=..., videos=..., return_tensors="pt")  # afterwards: it hands on what clips are judged by
>>> model.generate(**inputs, max_new_tokens=64)               # prunes the clips of `inputs`
>>> model.generate(**inputs, max_new_tokens=64, evs_rate=0.9)  # another rate for this call

The same scoring, selection and position code as in vLLM, so the model sees what vLLM would serve. Needs no vLLM.
"""

from evs_vllm.hf.enable import disable, enable, last_batch, last_plans

__all__ = ["enable", "disable", "last_batch", "last_plans"]

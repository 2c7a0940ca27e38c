# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of tiny models: Qwen2's splitting, a vocabulary of a few hundred."""

from collections.abc import Sequence
from typing import Any

# Qwen2-VL's own added tokens, in its own order (the ids are ours: the vocabulary is tiny).
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') or 'video' in part or 'video_url' in part %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Text the tokenizer is trained on: enough for common words to become one token.
CORPUS = (
    "You are a helpful assistant. Describe the video in one sentence. What moves in the picture and where does it go? "
    "A red square moves to the left while the blue circle stays in the corner. How many people ride their bikes down "
    "the street? Two riders turn right after the white car and stop. Compare the first clip with the second clip, then "
    "say which one is longer. The image shows a road, a tree, a house and a dog. Answer with yes or no. Why? Because "
    "the camera does not move, most of the background is the same in every frame, so only the moving parts are new. "
    "system user assistant 0 1 2 3 4 5 6 7 8 9 10 11 12 16 20 24 25 30 32 48 64 100 "
)


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS, chat_template: str = CHAT_TEMPLATE, **named: str
) -> Any:
    """A small tokenizer like Qwen2's. `named` special tokens are attributes of it, as some processors expect."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072,
        **({"extra_special_tokens": named} if named else {}),
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast

"""Small real tokenizers, trained in the test, and chat templates of the common kinds."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = [
    "What is 2+2? The answer is 4.",
    "You are a helpful assistant. Answer briefly.",
    "user assistant system think step by step\n\nFirst we add, then we check.",
    "Name a colour. Blue is a colour, red is a colour too.",
    "Hello there, how are you? I am fine, thank you very much.",
] * 4

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<unk>"]

TEMPLATES = {
    # Qwen 2.5: a system turn of its own when the conversation has none.
    "chatml": (
        "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Llama 3: first token in the template, contents trimmed.
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # Mistral: no header in front of the assistant, the end token after it.
    "inst": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST] {{ message.content }} [/INST]{% elif message.role == 'assistant' %}"
        " {{ message.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    # The blocks close in front of the end token, as many published templates do.
    "generation": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n"
        "{% else %}{{ message.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Nothing but text: no special token ends a turn.
    "plain_text": (
        "{% for message in messages %}### {{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:{% endif %}"
    ),
    # Qwen 3: thoughts of earlier turns disappear once a later turn follows.
    "forgets_thoughts": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
        "{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def write_byte_level(directory: Path, *, template: str | None = None, adds_bos: bool = False) -> Path:
    """A byte-level BPE tokenizer of 400 ids, saved as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = TEMPLATES[template]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_sentencepiece(directory: Path) -> Path:
    """A raw SentencePiece unigram model of 120 pieces with byte fallback off."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tiny"),
        vocab_size=100,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    return directory / "tiny.model"

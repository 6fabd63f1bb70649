"""Chat templates of three families, short ones of our own, and a tokenizer with their tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
FAMILIES = ("chatml", "llama3", "mistral")
BOS = {"chatml": None, "llama3": "<|begin_of_text|>", "mistral": "<s>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}
_WRITTEN = {
    "chatml": """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {OPEN}{{- m.content + '<|im_end|>\\n' }}{CLOSE}
    {%- else %}
        {{- m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "llama3": """
{{- bos_token }}
{%- for m in messages %}
    {%- set role = 'ipython' if m.role == 'tool' else m.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
    {%- if m.role == 'assistant' %}
        {OPEN}{{- m.content | trim + '<|eot_id|>' }}{CLOSE}
    {%- else %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    # No prompt for an answer: the end of the user's turn is one. The system's text goes into it.
    "mistral": """
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set ns.system = m.content + '\\n\\n' %}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + ns.system + m.content + '[/INST]' }}{%- set ns.system = '' %}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {OPEN}{{- ' ' + m.content | trim + eos_token }}{CLOSE}
    {%- endif %}
{%- endfor %}""",
}


def template(family: str, *, marked: bool = False) -> str:
    """The template of a family, with or without marks of what is generated."""
    marks = ("{%- generation %}", "{%- endgeneration %}") if marked else ("", "")
    return _WRITTEN[family].replace("{OPEN}", marks[0]).replace("{CLOSE}", marks[1])


def generated(family: str, answer: str) -> str:
    """What a model of a family has to generate for an answer."""
    return {
        "chatml": f"{answer}<|im_end|>\n",
        "llama3": f"{answer.strip()}<|eot_id|>",
        "mistral": f" {answer.strip()}</s>",
    }[family]


def chat_tokenizer(family: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes with a few merges, the tokens of all families, and padding with the end token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(SPECIAL) + 30,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(["what is the capital of the answer and the question"], trainer)
    names = {"bos_token": BOS[family], "eos_token": EOS[family], "pad_token": EOS[family]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=list(SPECIAL),
        **{name: token for name, token in names.items() if token is not None},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def chat(*turns: str) -> list[dict[str, str]]:
    """A conversation of turns such as ``user: hello``."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    parts = [turn.split(": ", 1) for turn in turns]
    return [{"role": roles.get(role, role), "content": text} for role, text in parts]


CHATS = (
    chat("u: what is it?", "a: the answer"),
    chat("s: be brief", "u: hello", "a: hi", "u: and the question?", "a:  what is é 日本 🎈 "),
    chat("u: look it up", "a: call(capital)", 't: {"found": "is"}', "a: it is\nthe capital"),
    chat("s: answer", "u: one", "a: two\n\nthree", "u: the last one has no answer"),
    chat("u: user", "a: assistant", "u: assistant", "a: <end>"),
)

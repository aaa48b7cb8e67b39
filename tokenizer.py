"""Byte-level BPE: train, encode, decode, save and load.

Merging is tiktoken's and training rustbpe's; this file adds the special tokens, the dialogue
templates, and vocabularies that lack single bytes.  A tokenizer.json of a pretrained model becomes
a Tokenizer in pretrained/tokenizer.py.
"""
import base64
import itertools
import json
import re
import unicodedata

import regex
import tiktoken

EOS = "<|endoftext|>"
# The pattern that splits a text into words before BPE merges bytes within each word.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)
# A turn is header.format(role), text, end of turn; `between` stands between two turns.
# Template "hh" is not listed: there a dialogue is the text as it is.
TEMPLATES = {
    "chatml": ("<|im_start|>{}\n", "<|im_end|>", "\n"),
    "llama3": ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
}
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}


class Tokenizer:
    """A tiktoken.Encoding with what a run needs to know beside it.

    pattern: the split pattern; ranks: {bytes: id}; special: {name of a special token: id}
    eos: name of the special token that ends a response; bos: of the one before a prompt, or ""
    template: form of a dialogue, "hh" (the words Human and Assistant) or a key of TEMPLATES
    more_eos: names of further tokens that end a sampled response; none is written in training
    in_text: names of those special tokens that ordinary text may contain (Qwen: <tool_call>)
    nfc: text is brought into Unicode's form NFC first (Qwen)
    """

    def __init__(
        self, pattern, ranks, special, eos=EOS, bos="", template="hh", more_eos=(), in_text=(),
        nfc=False,
    ):
        self.encoding = tiktoken.Encoding(
            "nanoreward", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.pattern = pattern
        self.ranks = ranks
        self.special = special
        self.eos = eos
        self.bos = bos
        self.template = template
        self.vocab_size = self.encoding.n_vocab
        self.eos_id = special[eos]
        self.more_eos = tuple(more_eos)
        self.end_ids = [self.eos_id, *(special[name] for name in more_eos)]
        self.in_text = tuple(in_text)
        self.nfc = nfc
        self.bos_id = special[bos] if bos else None
        self.missing_bytes = bytes(b for b in range(256) if bytes([b]) not in ranks)

    def encode_text(self, text):
        """Token ids of plain text; no part of it becomes a special token but in_text.  -> [int]"""
        if not self.in_text:
            return self.encode_words(text)
        tokens = []
        names = "|".join(map(regex.escape, self.in_text))
        for piece in regex.split(f"({names})", text):
            if piece in self.in_text:
                tokens.append(self.special[piece])
            else:
                tokens += self.encode_words(piece)
        return tokens

    def encode_words(self, text):
        """Token ids of text without special tokens -> [int]

        A pretrained vocabulary may lack single bytes (SmolLM2: some control characters).  They are
        dropped, as Hugging Face's tokenizers do, but only after the text has been split into words;
        tiktoken itself fails on them.
        """
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if not has_any(text, self.missing_bytes):
            return self.encoding.encode_ordinary(text)
        tokens = []
        for word in regex.findall(self.pattern, text):
            piece = word.encode().translate(None, self.missing_bytes)
            if piece:
                tokens += self.encoding._encode_single_piece(piece)
        return tokens

    def encode_dialogue(self, prompt):
        """Token ids of a prompt in HH's form, its turns in the markers of the template.  -> [int]

        Only the markers become special tokens, never the text of a turn.
        Departure: the system turn that the templates of some models add to every dialogue is left
        out; one that the dialogue has itself is kept.
        """
        if self.template == "hh":
            return self.encode_text(prompt)
        tokens = []
        text = ""  # text since the last special token: it is encoded as one piece
        for piece, is_marker in marked_pieces(prompt, self.template):
            if is_marker and piece in self.special:
                tokens += self.encode_text(text)
                tokens.append(self.special[piece])
                text = ""
            else:
                text += piece
        return tokens + self.encode_text(text)

    def decode(self, tokens):
        return self.encoding.decode(tokens)

    def to_json(self):
        tokens = sorted(self.ranks, key=self.ranks.get)
        table = {
            "pattern": self.pattern,
            "special": self.special,
            "end": self.eos,
            "begin": self.bos,
            "template": self.template,
            "tokens": [base64.b64encode(token).decode() for token in tokens],
        }
        more = {"more_ends": self.more_eos, "in_text": self.in_text, "nfc": self.nfc}
        return json.dumps(table | {key: value for key, value in more.items() if value})

    @classmethod
    def from_json(cls, text):
        """Raises ValueError where the text is not what to_json wrote."""
        try:
            saved = json.loads(text)
            special = saved["special"]
            eos = saved.get("end", EOS)
            bos = saved.get("begin", "")
            template = saved.get("template", "hh")
            more_eos = tuple(saved.get("more_ends", ()))
            in_text = tuple(saved.get("in_text", ()))
            nfc = bool(saved.get("nfc", False))
            reserved = set(special.values())
            free_ids = (i for i in itertools.count() if i not in reserved)  # ids leave no gap
            tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
            ranks = dict(zip(tokens, free_ids))
            ids = sorted([*ranks.values(), *reserved])
            is_whole = len(ranks) == len(tokens) and len(reserved) == len(special)
            if not is_whole or ids != list(range(len(ids))) or b"" in ranks:
                raise ValueError("tokens are missing or there twice")
            if template != "hh" and template not in TEMPLATES:
                raise ValueError(f"there is no template {template!r}")
            return cls(
                saved["pattern"], ranks, special, eos, bos, template, more_eos, in_text, nfc
            )
        except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE of `vocab_size` tokens on the texts; EOS is the last.  -> Tokenizer"""
    import rustbpe
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return Tokenizer(SPLIT_PATTERN, ranks, {EOS: len(ranks)})


def has_any(text, unwanted):
    """Whether the text, as UTF-8, holds one of the unwanted bytes."""
    if not unwanted:
        return False
    raw = text.encode()
    return len(raw.translate(None, unwanted)) < len(raw)


def split_turns(prompt):
    """A dialogue in HH's form -> [(role, text)], the last turn the assistant's.

    Text before the first marker is a system turn if it begins with "\\n\\nSystem:", else a human
    turn.  A dialogue that ends with an assistant turn is continued there; any other gets an empty
    assistant turn.
    """
    opening, *rest = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = []
    if opening.startswith("\n\nSystem:"):
        turns.append(("System", opening.removeprefix("\n\nSystem:")))
    elif opening.strip():
        turns.append(("Human", opening))
    turns += zip(rest[::2], rest[1::2])
    if not turns or turns[-1][0] != "Assistant":
        turns.append(("Assistant", ""))
    return turns


def marked_pieces(prompt, template):
    """Yield (piece of text, whether it may be a special token) of a dialogue in a template."""
    header, end_of_turn, between = TEMPLATES[template]
    turns = split_turns(prompt)
    for i, (role, text) in enumerate(turns):
        if i > 0:
            yield between, True
        for piece in re.split(r"(<\|\w+\|>)", header.format(ROLES[role])):
            yield piece, True
        yield text.strip(), False
        if i < len(turns) - 1:
            yield end_of_turn, True

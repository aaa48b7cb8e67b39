"""tokenizer.json of a pretrained model -> Tokenizer with equal token ids for any text, and back.

Only a byte-level BPE can be equal (GPT-2, SmolLM2, Llama 3, Qwen, Mistral's Tekken); any other
tokenizer raises a one-line ConfigError that names what is different.
"""
import json
import math
import os
import re

from config import ConfigError
from pretrained.hub import read_json, short_repr
from tokenizer import EOS, ROLES, SPLIT_PATTERN, TEMPLATES, Tokenizer

GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
    r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (  # Mistral's since Nemo
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# SmolLM2 splits at every digit and then as GPT-2: a digit takes no space before it, and the blanks
# before one stay whole.  The two ranges are digits since Unicode 17, which the splitting at digits
# follows and \p{N} here does not.
DIGIT = r"\p{N}" + "\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
DIGITS = (
    rf"'s|'t|'re|'ve|'m|'ll|'d|[{DIGIT}]| ?\p{{L}}+"
    rf"| ?[^\s\p{{L}}{DIGIT}]+|\s+(?![^\s{DIGIT}])|\s+"
)
# Each of these covers any text; others might not.
SPLITS = (GPT2, LLAMA3, QWEN, TEKKEN, DIGITS, SPLIT_PATTERN)

MAX_UNUSED = 4096  # ids of the model without a token; more mean that the tokenizer is another one
MAX_WORD = 1024    # bytes of a token


def byte_symbols():
    """GPT-2's printable character for each byte -> {byte: character}"""
    symbols = {}
    for byte in (*range(33, 127), *range(161, 173), *range(174, 256)):
        symbols[byte] = chr(byte)
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - 188)  # 188 bytes are printable as they are
    return symbols


SYMBOL = byte_symbols()
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}


# --------------------------------------------------------------------------------------------------
# Import

def template_of(folder):
    """Form of dialogues whose markers the folder's chat template has: a key of TEMPLATES, or hh"""
    text = ""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    elif os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        table = read_json(os.path.join(folder, "tokenizer_config.json"))
        text = json.dumps(table.get("chat_template", ""), ensure_ascii=False)
    for name, (header, _, _) in TEMPLATES.items():
        if header.partition("{}")[0] in text:
            return name
    return "hh"


def load(folder, vocab, template="hh"):
    """tokenizer.json -> Tokenizer whose token ids are equal on any text

    vocab: number of token ids of the model; ids without a token get names of special tokens that
    no text contains, because the model may sample them.

    tiktoken merges any two neighbours that form a token, lowest id first; Hugging Face's BPE merges
    those in a list of merges, first in the list first.  Both are the same if every token's last
    merge, found tiktoken's way, is in the list, and the list is in the order of ids: by induction
    over the steps, as neighbours that form a token were always made from that token's own bytes.

    Raises ConfigError, which names the file and what cannot be read exactly.
    """
    path = os.path.join(folder, "tokenizer.json")
    table = read_json(path)

    def refuse(why):
        raise ConfigError(
            f"{path}: {why}; only a byte-level BPE as in GPT-2, Llama 3, Qwen, SmolLM2 or Mistral "
            "Nemo can be read exactly"
        )

    model = check_kind(table, refuse)
    pattern = split_pattern(table.get("pre_tokenizer"), refuse)
    ranks, special = read_vocabulary(model, table.get("added_tokens", []), vocab, refuse)
    check_merges(model, ranks, refuse)
    name_unused_ids(special, ranks, vocab, refuse)
    bos = find_bos(table.get("post_processor"), special, refuse)
    eos, *more_eos = find_ends(folder, special)
    if template != "hh":
        more_eos = [eos, *more_eos]
        eos = TEMPLATES[template][1]
        more_eos = [name for name in more_eos if name != eos]
        for marker in re.findall(r"<\|\w+\|>", "".join(TEMPLATES[template])):
            if marker not in special:
                raise ConfigError(
                    f"data.template = {template!r}: {path} has no special token {marker}; use "
                    "data.template=hh"
                )
    in_text = [token["content"] for token in table.get("added_tokens", [])
               if not token.get("special")]
    return Tokenizer(pattern, ranks, special, eos, bos, template, more_eos, in_text,
                     nfc=table.get("normalizer") is not None)


def check_kind(table, refuse):
    """The BPE model of a tokenizer.json; refuse any operation that merging by ids does not have."""
    model = table.get("model")
    if not isinstance(model, dict):
        refuse(f"a tokenizer of type {short_repr(model)}")
    if model.get("type", "BPE") != "BPE":
        refuse(f"a tokenizer of type {short_repr(model.get('type'))}")
    if model.get("byte_fallback"):
        refuse(
            "SentencePiece's BPE with byte_fallback (as in Llama 2 and TinyLlama) falls back to "
            "bytes by characters, not by merges"
        )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"model.{key} = {short_repr(model[key])}")
    normalizer = table.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        refuse(f"a normalizer, {short_repr(normalizer)}, changes the text first")
    return model


def split_pattern(pre, refuse):
    """The pre-tokenizer, which splits a text into words before merging -> a regular expression"""
    parts = [pre]
    if isinstance(pre, dict) and pre.get("type") == "Sequence":
        parts = pre.get("pretokenizers")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        refuse(f"pre_tokenizer = {short_repr(pre, 400)}")
    pattern = known_pattern(parts)
    if pattern is None:
        refuse(f"pre_tokenizer = {short_repr(pre, 400)}")
    return pattern


def known_pattern(parts):
    """The steps of a pre-tokenizer -> the regular expression equal to them, None if unknown"""
    if not parts:
        return None
    *first, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    use_regex = last.get("use_regex", True)
    if not first:
        return GPT2 if use_regex else None
    if len(first) > 1:
        return None
    step = first[0]
    if step.get("type") == "Digits" and step.get("individual_digits") and use_regex:
        return DIGITS
    is_split = step.get("type") == "Split" and step.get("behavior") == "Isolated"
    pattern = step.get("pattern")
    if not is_split or step.get("invert") or use_regex or not isinstance(pattern, dict):
        return None
    regex = pattern.get("Regex")
    return regex if regex in SPLITS else None


def read_vocabulary(model, added, vocab, refuse):
    """-> ranks {bytes: id} and special tokens {name: id}"""
    words = model.get("vocab")
    merges = model.get("merges")
    is_whole = isinstance(words, dict) and isinstance(merges, list) and isinstance(added, list)
    if not is_whole:
        refuse("model.vocab, model.merges or added_tokens is missing or of another type")
    special = read_special(added, vocab, refuse)
    ranks = {}
    for word, i in words.items():
        if not is_id(i, vocab) or special.get(word, i) != i:
            refuse(
                f"token {short_repr(word)} has id {short_repr(i)}, of vocab_size = {vocab} of "
                "config.json"
            )
        if word in special:
            continue
        if not 0 < len(word) <= MAX_WORD or not all(symbol in BYTE for symbol in word):
            refuse(f"token {short_repr(word)} is not written in bytes, or in more than 1,024")
        ranks[to_bytes(word)] = i
    if not ranks:
        refuse("model.vocab has no tokens of text")
    ids = {*ranks.values(), *special.values()}
    if len(ids) != len(ranks) + len(special):
        refuse("two tokens have the same id")
    unk = model.get("unk_token")
    if unk is not None and any(bytes([byte]) not in ranks for byte in range(256)):
        # without it such bytes are dropped: Tokenizer.encode_text
        refuse(f"unk_token = {short_repr(unk)} replaces bytes without a token")
    return ranks, special


def read_special(added, vocab, refuse):
    """added_tokens -> {name: id}, also those that ordinary text may contain"""
    special = {}
    for token in added:
        name = token.get("content") if isinstance(token, dict) else None
        if not isinstance(name, str) or not name or not is_id(token.get("id"), vocab):
            refuse(
                f"added token {short_repr(token)} has no content or no id below vocab_size = "
                f"{vocab} of config.json"
            )
        if any("\ud800" <= c <= "\udfff" for c in name):
            refuse(f"added token {short_repr(name)} is not valid text")
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            refuse(
                f"added token {short_repr(name)} has lstrip, rstrip or single_word, and cuts "
                "ordinary text"
            )
        if not token.get("special") and token.get("normalized") and not name.isascii():
            refuse(f"added token {short_repr(name)} is looked for in normalised text")
        special[name] = token["id"]
    return special


def is_id(value, vocab):
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and 0 <= value < vocab


def to_bytes(word):
    """A token in GPT-2's symbols -> its bytes; KeyError for any other character"""
    return bytes(BYTE[symbol] for symbol in word)


def to_symbols(token):
    """Bytes of a token -> the same in GPT-2's symbols"""
    return "".join(SYMBOL[byte] for byte in token)


def check_merges(model, ranks, refuse):
    """Refuse merges that give other tokens than merging by ids does; the proof is in load."""
    try:
        order = merge_order(model["merges"], ranks)
    except (KeyError, TypeError, ValueError):
        refuse("a merge is not one of two tokens into a third, or is listed twice")
    before = -1
    for token in merged_tokens(ranks):
        pair = last_merge(token, ranks)
        if pair is None and model.get("ignore_merges"):
            continue  # both find it only as a whole word
        if order.get(pair, -1) <= before:
            refuse(
                "the merges are not in the order of the ids: see token "
                f"{short_repr(token)}, id {ranks[token]}"
            )
        before = order[pair]


def merge_order(merges, ranks):
    """-> {(left, right): position in the list}; KeyError, TypeError or ValueError if it is wrong"""
    order = {}
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        left, right = map(to_bytes, parts)
        is_merge = left in ranks and right in ranks and left + right in ranks
        if not is_merge or (left, right) in order:
            raise ValueError
        order[left, right] = i
    return order


def merged_tokens(ranks):
    """Tokens of several bytes, in the order of their ids"""
    return sorted((token for token in ranks if len(token) > 1), key=ranks.get)


def last_merge(token, ranks):
    """Merge a token's bytes, lowest rank first, to two parts.  -> (left, right), None if stuck"""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = math.inf
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], math.inf)
            if rank < best:
                best = rank
                at = i
        if best == math.inf:
            return None
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def name_unused_ids(special, ranks, vocab, refuse):
    """Add a special token for each id of the model that has no token."""
    used = {*ranks.values(), *special.values()}
    if vocab - len(used) > MAX_UNUSED:
        refuse(f"{len(used):,} tokens are too few for vocab_size = {vocab:,} of config.json")
    for i in range(vocab):
        if i not in used:
            name = f"<|unused_{i}|>"
            while name in special:
                name = f"<{name}>"
            special[name] = i


def find_bos(post, special, refuse):
    """Name of the special token that the post-processor puts before every text, or "" """
    parts = [post]
    if isinstance(post, dict) and post.get("type") == "Sequence":
        parts = post.get("processors")
    for part in parts if isinstance(parts, list) else [parts]:
        if part is None or isinstance(part, dict) and part.get("type") == "ByteLevel":
            continue
        try:
            return bos_of_template(part, special)
        except (TypeError, KeyError, ValueError, AttributeError):
            refuse(f"post_processor = {short_repr(part)}")
    return ""


def bos_of_template(part, special):
    """A post-processor that writes [bos] text -> bos or ""; KeyError and the like for any other"""
    if part["type"] != "TemplateProcessing":
        raise ValueError
    *before, text = part["single"]
    if "Sequence" not in text or len(before) > 1:
        raise ValueError
    if not before:
        return ""
    bos = before[0]["SpecialToken"]["id"]
    if bos not in special:
        raise ValueError
    return bos


def find_ends(folder, special):
    """Names of the special tokens that end a response, the one that training appends first

    generation_config.json or config.json may list several; else the one of tokenizer_config.json.
    """
    for file in ("generation_config.json", "config.json"):
        path = os.path.join(folder, file)
        ids = read_json(path).get("eos_token_id") if os.path.exists(path) else None
        if isinstance(ids, list) and len(ids) > 1:
            name_of = {i: name for name, i in special.items()}
            if not all(isinstance(i, int) and i in name_of for i in ids):
                raise ConfigError(f"{path}: eos_token_id = {short_repr(ids)}: must be ids of "
                                  "special tokens of tokenizer.json")
            return [name_of[i] for i in dict.fromkeys(ids)]
    return [find_eos(folder, special)]


def find_eos(folder, special):
    """Name of the special token that ends a response, by tokenizer_config.json or config.json"""
    path = os.path.join(folder, "tokenizer_config.json")
    name = read_json(path).get("eos_token") if os.path.exists(path) else None
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        eos_id = read_json(os.path.join(folder, "config.json")).get("eos_token_id")
        if isinstance(eos_id, list) and eos_id:
            eos_id = eos_id[0]
        name = EOS
        for token, i in special.items():
            if i == eos_id:
                name = token
                break
    if not isinstance(name, str) or name not in special:
        raise ConfigError(
            f"{folder}: the end of a text, {short_repr(name)}, is not a special token of "
            "tokenizer.json; set eos_token in tokenizer_config.json"
        )
    return name


# --------------------------------------------------------------------------------------------------
# Export

def to_json(tokenizer, special=None):
    """Tokenizer -> the dictionary of a tokenizer.json

    special: its special tokens {name: id}, perhaps one more; None: tokenizer.special
    """
    special = tokenizer.special if special is None else special
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "post_processor": bos_template(tokenizer.bos, special),
        "decoder": byte_level,
        "added_tokens": added_tokens(special, tokenizer.in_text),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": bpe_model(tokenizer.ranks, special),
    }


def bos_template(bos, special):
    """The post-processor that puts bos before every text; None without one"""
    if not bos:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    second_text = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, second_text],
        "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
    }


def added_tokens(special, in_text=()):
    """Special tokens in the order of their ids, as entries of a tokenizer.json"""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = []
    for name in sorted(special, key=special.get):
        is_special = name not in in_text
        entries.append({"id": special[name], "content": name, **flags, "special": is_special})
    return entries


def bpe_model(ranks, special):
    """The BPE part of a tokenizer.json"""
    merges = []
    for token in merged_tokens(ranks):
        pair = last_merge(token, ranks)
        if pair is not None:
            merges.append(" ".join(map(to_symbols, pair)))
    words = {to_symbols(token): i for token, i in ranks.items()}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a whole word that is a token needs no merges, as in tiktoken
        "vocab": words | special,
        "merges": merges,
    }


def chat_template(tokenizer):
    """Jinja template that writes [{"role", "content"}, ...] as training has read them.

    It ends with the EOS of the last answer, the token at which a reward is read.  Content is a text
    or a list of parts of type text.  As in Tokenizer.encode_dialogue, the markers of a model take a
    tool's turn, and a system turn that is not the first, as text of the turn before.  What cannot
    be written, such as another role or calls of tools, raises an error that names it.
    """
    words = {role: word for word, role in ROLES.items()} | {"tool": "Tool"}
    plain = []
    for role, word in words.items():
        plain.append(quoted(role) + ": " + quoted(f"\n\n{word}: "))
    if tokenizer.template == "hh":
        ends = "loop.last and role == 'assistant' and not add_generation_prompt"
        turn = "{{ plain[role] ~ ns.text }}{{ eos_token if " + ends + " }}"
        last = ""
        ask = "\n\nAssistant:"
    else:
        turn, last, ask = marked_turns(*TEMPLATES[tokenizer.template])
    pieces = [
        "{{ bos_token }}" if tokenizer.bos else "",
        "{% if tools %}" + refusal("'tools cannot be written'") + "{% endif %}",
        "{% set plain = {" + ", ".join(plain) + "} %}",
        "{% set ns = namespace(text='', role='', turn='') %}",
        "{% for message in messages %}{% set role = message['role'] %}",
        *content_pieces(words),
        turn,
        "{% endfor %}",
        last,
        "{% if add_generation_prompt %}{{ " + quoted(ask) + " }}{% endif %}",
    ]
    return "".join(pieces)


def marked_turns(header, end_of_turn, between):
    """Jinja for turns in markers, which are written when the next one begins

    -> what is done for a message, what at the end, and the text that asks for an answer
    """
    before, after = header.split("{}")
    parts = [quoted(before), "ns.role", quoted(after), "ns.turn | trim", quoted(end_of_turn)]
    write = "{{ " + " ~ ".join(parts) + " }}"
    turn = [
        "{% if role == 'tool' or role == 'system' and not loop.first %}",
        "{% set ns.turn = ns.turn ~ plain[role] ~ ns.text %}",
        "{% set ns.role = ns.role or 'user' %}",
        "{% else %}",
        "{% if ns.role %}" + write + "{{ " + quoted(between) + " }}{% endif %}",
        "{% set ns.role = role %}",
        "{% set ns.turn = ns.text %}",
        "{% endif %}",
    ]
    last = "{% if ns.role %}" + write + "{% endif %}"
    return "".join(turn), last, between + header.format("assistant")


def content_pieces(roles):
    """Part of a Jinja template: ns.text is the text of `message`, or it is refused."""
    roles = ", ".join(roles)
    return [
        "{% if role not in plain %}",
        refusal(f"'a message of role ' ~ role ~ ' cannot be written; the roles are {roles}'"),
        "{% elif message['tool_calls'] %}",
        refusal("'tool_calls cannot be written'"),
        "{% elif message['content'] is string %}",
        "{% set ns.text = message['content'] %}",
        "{% elif message['content'] %}",
        "{% set ns.text = '' %}",
        "{% for part in message['content'] %}",
        "{% if part['text'] is not string %}",
        refusal("'a part of type ' ~ part['type'] ~ ' cannot be written, only text'"),
        "{% endif %}",
        "{% set ns.text = ns.text ~ part['text'] %}",
        "{% endfor %}",
        "{% else %}",
        refusal("'a message of role ' ~ role ~ ' has no content'"),
        "{% endif %}",
    ]


def refusal(reason):
    """Jinja that raises an error.  reason: an expression of Jinja"""
    return "{{ raise_exception(" + reason + ") }}"


def quoted(text):
    """A string literal of Jinja"""
    return "'" + text.replace("\n", "\\n") + "'"

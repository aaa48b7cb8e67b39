"""Turns and bare prompts -> the text of a dialogue, as HH-RLHF writes it.

    "\\n\\nSystem: Be brief.\\n\\nHuman: 2+2?\\n\\nAssistant: 4"

Every turn is a blank line, the name of its role, a colon, a blank and its text as it is.  A prompt
ends with the marker "\\n\\nAssistant:", an answer begins with the blank.  The chat templates know a
system turn at the beginning of a dialogue; the text of a later one, and of a tool's turn, stays
part of the turn before it there, behind its marker.
"""
import json

from data import ASSISTANT_MARKER, HUMAN_MARKER, DataError
from formats.values import check_copyable, check_text, json_type

ROLES = {  # names of roles in conversational layouts -> the word in a dialogue
    "user": "Human", "human": "Human", "prompter": "Human",
    "assistant": "Assistant", "gpt": "Assistant", "model": "Assistant", "bot": "Assistant",
    "function_call": "Assistant",
    "system": "System", "developer": "System",
    "tool": "Tool", "function": "Tool", "function_response": "Tool", "observation": "Tool",
    "ipython": "Tool",
}
KEYS = (("role", "content"), ("from", "value"))  # of a message: role, text


# --------------------------------------------------------------------------------------------------
# Texts


def render(turns):
    """[(role, text)] -> text of the dialogue"""
    return "".join(f"\n\n{role}: {text}" for role, text in turns)


def split_turns(chosen, rejected, first=0):
    """Two dialogues that share their first turns -> prompt, chosen response, rejected response.

    chosen, rejected: [(role, text)].  They are split before the last assistant's turn up to which
    they are equal; first: number of turns that are the prompt at least.  Without such a turn the
    prompt is empty and each response is its whole dialogue.
    """
    stop = 0
    while stop < min(len(chosen), len(rejected)) and chosen[stop] == rejected[stop]:
        stop += 1
    while stop >= first:
        if role_at(chosen, stop) == role_at(rejected, stop) == "Assistant":
            prompt = render(chosen[:stop]) + ASSISTANT_MARKER
            return prompt, answer_text(chosen[stop:]), answer_text(rejected[stop:])
        stop -= 1
    return "", render(chosen), render(rejected)


def role_at(turns, i):
    return turns[i][0] if i < len(turns) else None


def answer_text(turns):
    """Turns of which the first is the assistant's -> text that follows "\\n\\nAssistant:" """
    return render(turns).removeprefix(ASSISTANT_MARKER)


def is_dialogue(prompt):
    return HUMAN_MARKER in prompt or ASSISTANT_MARKER in prompt


def as_dialogue(prompt, answers, notes):
    """A prompt, bare or a dialogue, and answers to it -> prompt, [answers] that continue it.

    A bare prompt becomes a human turn, and its answers begin with a blank unless one of them has
    one already.  A dialogue that ends in a blank gives it to the answers: a tokenizer joins it with
    the word that follows.  An empty prompt stays empty.
    """
    if is_dialogue(prompt) or not prompt:
        text = prompt.rstrip(" ")
        blanks = prompt[len(text):]
        return text, [blanks + answer for answer in answers]
    notes["bare"] += 1
    if not any(answer[:1].isspace() for answer in answers):
        answers = [f" {answer}" for answer in answers]
    return f"{HUMAN_MARKER} {prompt.strip()}{ASSISTANT_MARKER}", answers


# --------------------------------------------------------------------------------------------------
# Messages


def read_turns(value, key, where):
    """A list of messages, or one message -> [(role, text)].  Raises DataError

    A message is {"role", "content"} or {"from", "value"}; its content a text, or a list of parts
    {"type": "text", "text": ...}.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise DataError(f"{where}: {key!r} must be a list of messages, not {json_type(value)}")
    return [read_message(message, key, where) for message in messages]


def read_message(message, key, where):
    """-> role in a dialogue, text"""
    if isinstance(message, dict):
        for role_key, text_key in KEYS:
            if role_key in message and text_key in message:
                role = read_role(message[role_key], key, where)
                return role, read_content(message, text_key, key, where)
    shown = "one without them" if isinstance(message, dict) else json_type(message)
    raise DataError(
        f"{where}: {key!r} must hold messages with role and content, or from and value, not {shown}"
    )


def read_role(value, key, where):
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise DataError(
            f"{where}: {key!r} has a message of role {ascii(value)[:40]}; known are "
            f"{', '.join(ROLES)}"
        )
    return role


def read_content(message, text_key, key, where):
    """The text of a message, and the calls of tools that it makes as JSON behind it."""
    content = message[text_key]
    calls = message.get("tool_calls")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(read_part(part, key, where) for part in content)
    check_text(content, key, where)
    if calls:
        check_copyable(calls, where)
        content += json.dumps(calls)
    return content


def read_part(part, key, where):
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type", "unknown") if isinstance(part, dict) else json_type(part)
        raise DataError(
            f"{where}: {key!r} has a part that is no text ({ascii(kind)[:40]}); only text is read; "
            "remove the part or the record"
        )
    return text

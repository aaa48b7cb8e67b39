"""Layouts of preference data: an adapter each, which finds the texts of a record.

    sources.py        a name -> files: a file, an address, a folder, a set of the hub
    records.py        files -> records, whatever they are packed in: containers.py, tables.py,
                      signatures.py
    values.py         JSON values and their checks
    pairs.py          the table of adapters; records -> pairs, and a pair's label exchanged
    adapter.py        what an adapter is
    dialogue.py       turns and bare prompts -> text of this project's dialogues
    the adapters      hh_dialogue, explicit_prompt, implicit_prompt, conversations, two_answers,
                      several_answers

docs/formats.md lists the layouts for those who have data.
"""

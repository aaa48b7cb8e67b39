"""Layouts of preference data: an adapter each, which finds the three texts of a record.

formats.pairs picks the adapter of a record.  An adapter is a module with

    NAME                            the layout's name in messages
    KEYS                            the keys that every record of the layout has
    matches(record)                 True if the record, a dictionary, has this layout
    to_texts(record)                -> prompt, chosen response, rejected response
"""

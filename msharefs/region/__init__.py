"""What a region *is*: its mapping table and its rules. Pure, synchronous, typed; no I/O.

``table`` holds mappings and plans changes of them, ``region`` adds the rules that concern whole
regions (size, descriptors, rights), ``events`` says what happened, ``errors`` what was refused.
"""

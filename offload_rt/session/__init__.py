"""A model opened, planned, loaded, answering in text: what the command line and Python share.

No module here prints or reads a command line: an `Observer` is told what goes on, `Interrupts` say
when to stop. Importing them imports no torch.
"""

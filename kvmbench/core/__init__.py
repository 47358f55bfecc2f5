"""The C core: descriptors, guest memory and loops, and the messages that reach it."""

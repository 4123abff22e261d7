"""
pgtrack in the frameworks, queues, clients and tracers that programs are made of.

One module each, imported only by whoever uses it; nothing here imports them.
"""

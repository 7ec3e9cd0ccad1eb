"""What a run needs before it starts: memory of each worker, and time of an iteration.

`cost` is arithmetic on numbers; `probe` measures the numbers that depend on the model's code and on
the machine; `plan` reads them from a configuration.
"""

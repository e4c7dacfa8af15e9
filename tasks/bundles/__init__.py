"""The bundled splits: <task>.py here writes assets/<task>-mini with `write(folder)`, from its own seed."""

"""The packed checkpoint (FORMAT.md): validated reader, writer, and the reader of unquantized folders."""

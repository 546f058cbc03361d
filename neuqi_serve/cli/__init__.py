"""The command ``neuqi``: one verb per file, no logic of its own."""

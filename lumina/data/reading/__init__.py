"""From files, datasets and the standard library to documents, a unit of work at a time."""

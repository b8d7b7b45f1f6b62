"""Files and folders: where they may lie, and how they are read and written."""

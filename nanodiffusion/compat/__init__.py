"""Other systems' own interfaces, expressed on the core."""

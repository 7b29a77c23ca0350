"""PTX: parsed, its memory accesses found, and rewritten so that each is translated. Pure: text in, text out."""

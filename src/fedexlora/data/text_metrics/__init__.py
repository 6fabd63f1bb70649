"""How close generated texts are to one or more references: BLEU, NIST, METEOR, ROUGE-L, CIDEr."""

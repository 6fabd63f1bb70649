"""Answers in generated texts: where an answer stands, and whether it is the right one."""

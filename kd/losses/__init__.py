"""Losses between a student's logits, a teacher's logits and labels."""

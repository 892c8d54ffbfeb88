"""Adapter checkpoints of this package, PEFT and LyCORIS: readers and writers."""

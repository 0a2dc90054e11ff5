"""Other people's losses, under their own names and signatures, computed by kdfast.

Each module stands in for one library, and imports nothing of it.
"""

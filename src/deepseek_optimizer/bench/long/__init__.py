"""Long texts with known answers, after the description of RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of
Your Long-Context Language Models?"): hidden facts, exact lengths, and scoring. Nothing is downloaded:
texts consist of Python's own documentation and of random names and numbers.
"""

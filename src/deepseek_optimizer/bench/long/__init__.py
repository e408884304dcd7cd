"""Long texts with known answers, after the description of RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of
Your Long-Context Language Models?"): what is hidden in them, how long they are and what counts as right. Nothing is downloaded;
texts are made of what every Python ships, and of names and numbers that are drawn.
"""

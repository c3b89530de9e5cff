"""What the next step computes, and in which pages: plain Python, without torch."""

"""The arithmetic of serving, behind one interface: plain torch, and C++ for the processor at hand."""

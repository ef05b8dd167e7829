"""What scores a candidate: reward models and callables behind one contract."""

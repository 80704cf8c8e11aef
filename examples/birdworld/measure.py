"""stub"""
def measure(f): return {}

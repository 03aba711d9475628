"""What measures say to claims: one function a claim, named by it, and a file for each link of the chain.

`measure_all` asks all of them of one model. The names are listed in __init__.pyi.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

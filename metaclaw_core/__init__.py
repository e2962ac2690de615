"""MetaClaw for mitmproxy: an agent's LLM traffic, intercepted, becomes skills and training data.

Data flows one way: ``wire`` parses, ``agents`` identifies, ``store`` keeps, ``skills`` gives back.
Only ``proxy`` imports mitmproxy. Nothing here imports anything heavy.
"""

__version__ = "0.1.0"

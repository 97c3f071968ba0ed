"""The companion of Koresh et al. (2025): single-nodal performance, ANDC pruning and heads of a compact transformer.

Data flows one way: data -> models -> training -> taps -> readouts -> snp -> heads, andc, macroscopic -> claims, figures
`experiment` chains these for one profile and stores what they make; `cli` is the entry, python -m paperlib.
"""

__version__ = "0.1.0"

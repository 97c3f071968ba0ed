"""The companion of Koresh et al. (2025): single-nodal performance, ANDC pruning and heads of a compact transformer.

Data flows one way: data -> models -> training -> taps -> readouts -> snp -> (andc, heads) -> verdicts -> figures.
`notebooks/stages` chains these for one profile (`notebooks/verdicts.py` is there, too), `runs` keeps what they made.
"""

__version__ = "0.1.0"

"""A tenant's routing policy: rules as data, in a small safe language. See docs/routing-policy.md.

`document` reads and checks a policy's text, `expressions` its conditions, `apply` says what it does to one request,
`compare` what a new policy would have changed. Nothing here reads a clock, a file or a database.
"""

from router.policy.apply import PolicyOutcome, Step, apply
from router.policy.document import CompiledPolicy, compile_policy
from router.policy.errors import CostExceeded, ExpressionError, InvalidPolicy, PolicyError
from router.policy.facts import CandidateFacts, RequestFacts, visible_headers

__all__ = [
    "CandidateFacts",
    "CompiledPolicy",
    "CostExceeded",
    "ExpressionError",
    "InvalidPolicy",
    "PolicyError",
    "PolicyOutcome",
    "RequestFacts",
    "Step",
    "apply",
    "compile_policy",
    "visible_headers",
]

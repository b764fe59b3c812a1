"""Thirty pages of real reference documentation that come with CPython, and questions about places in them.

Written by Python's authors for people, not for these tests: prose, grammar, code, tables, footnotes. `help("while")`
prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

TITLE = "The Python language reference"
PAGES = (
    "assert async binary bitwise class debugger del execmodel floating for function global id-classes identifiers "
    "imaginary import in integers lambda nonlocal power raise return shifting slicings strings truth try while with"
).split()


@dataclass(frozen=True)
class PlaceQuestion:
    """A question, and words that stand in the text only where it is answered."""

    text: str
    quote: str


QUESTIONS = (
    PlaceQuestion("What becomes of assert statements when Python is run with -O?",
                  "The current code generator emits no code for an"),
    PlaceQuestion("What does a with statement do when __exit__ returns a true value?",
                  "If the return value was true, the exception is suppressed, and"),
    PlaceQuestion("How do I chain a new exception to its cause with raise and from?",
                  'The "from" clause is used for exception chaining'),
    PlaceQuestion("How can I create an exception and set its own traceback in one step?",
                  "You can create an exception and set your own traceback in"),
    PlaceQuestion("Does a global statement affect code in a string that is given to exec()?",
                  'or code object supplied to the built-in "exec()" function does not'),
    PlaceQuestion("Must the names in a nonlocal statement refer to bindings that exist already?",
                  "must refer to pre-existing bindings in an"),
    PlaceQuestion("What happens when the expression of a while loop is false the first time it is tested?",
                  "first suite; if the expression is false (which may be the first time"),
    PlaceQuestion("Are the names in the target list of a for loop deleted when the loop ends?",
                  "Names in the target list are not deleted when the loop is finished,"),
    PlaceQuestion("Which operator is meant for matrix multiplication?", "operator is intended to be used for matrix"),
    PlaceQuestion("Which sign does the result of the modulo operator have?",
                  "The modulo operator always yields a result with the same sign"),
    PlaceQuestion("May underscores stand between the digits of an integer literal?",
                  "One underscore can occur between digits, and after base specifiers"),
    PlaceQuestion("How do I write a complex number with a nonzero real part?",
                  "number with a nonzero real part, add a floating point number to it,"),
    PlaceQuestion("To which normal form are identifiers converted while parsing?",
                  "All identifiers are converted into the normal form NFKC while parsing;"),
    PlaceQuestion("Which characters may bytes literals contain?",
                  "only contain ASCII characters; bytes with a numeric value of 128 or"),
    PlaceQuestion("What is the result of raising a negative number to a fractional power?",
                  "Raising a negative number to a fractional power results in a"),
    PlaceQuestion("May a lambda expression contain statements or annotations?",
                  "Note that functions created with lambda expressions cannot contain"),
    PlaceQuestion("Is the finally clause run when return leaves a try statement?",
                  'clause, that "finally" clause is executed before really leaving the'),
    PlaceQuestion("What happens when I delete a name?",
                  "Deletion of a name removes the binding of that name from the local or"),
    PlaceQuestion("Which built-in objects are considered false?", "most of the built-in objects considered false:"),
    PlaceQuestion("Is the empty string a substring of every other string?",
                  "Empty strings are always considered to be a substring of any other"),
    PlaceQuestion("Is the order in which attributes are defined in a class body kept?",
                  "The order in which attributes are defined in the class body is"),
    PlaceQuestion("When are the decorator expressions of a function evaluated?",
                  "expressions. Decorator expressions are evaluated when the function is"),
    PlaceQuestion("How do I set a temporary breakpoint in the debugger?",
                  "Temporary breakpoint, which is removed automatically when it is"),
    PlaceQuestion("Which lines may come before a future statement in a module?",
                  "A future statement must appear near the top of the module."),
    PlaceQuestion("How is a right shift by n bits defined?",
                  "A right shift by *n* bits is defined as floor division by"),
    PlaceQuestion("Where may an async for statement be used?",
                  'It is a "SyntaxError" to use an "async for" statement outside the body'),
)


def text() -> str:
    """All pages, one after the other."""
    return "\n".join(topics[name].strip("\n") + "\n" for name in PAGES)


def place(question: PlaceQuestion, document: str) -> int:
    """Where in the document the question is answered, in characters. Raises ValueError unless that is one place."""
    if document.count(question.quote) != 1:
        raise ValueError(f"'{question.quote}' stands {document.count(question.quote)} times in the document")
    return document.index(question.quote)

"""Facts out of a short text into JSON, with one example: is it valid JSON of the schema, and how many fields are right?"""

import json
import random
from typing import Any

from trimode.evaluation.tasks.interface import Example, Grade, Task

__all__ = ["extraction", "first_object", "schema_fault"]

NAMES = [
    "Ada Brandt",
    "Jonas Keller",
    "Mira Santos",
    "Omar Haddad",
    "Lena Fischer",
    "Tom Walsh",
    "Priya Nair",
    "Yuki Tanaka",
]
CITIES = ["Lisbon", "Oslo", "Graz", "Leeds", "Quito", "Perth", "Turin", "Kyoto"]
TRADES = ["baker", "nurse", "plumber", "teacher", "pilot", "gardener", "lawyer", "weaver"]
GOODS = ["lamp", "chair", "kettle", "tent", "violin", "bicycle", "printer", "carpet"]
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
}


def extraction(seed: int, *, limit: int | None) -> Task:
    """Made-up persons and orders."""
    examples = []
    for number in range(limit or 50):
        rng = random.Random(f"json {seed} {number}")
        make = _person if number % 2 == 0 else _order
        (shown, shown_facts, _), (text, facts, types) = make(rng), make(rng)
        schema = {
            "type": "object",
            "properties": {name: _property(kind) for name, kind in types.items()},
            "required": list(types),
            "additionalProperties": False,
        }
        ask = f"Extract the facts as one JSON object with the fields {', '.join(types)}.\n\nText: "
        example = Example(
            id=f"json/{seed}/{number}",
            prompt=ask + text,
            reference={"schema": schema, "facts": facts},
            shots=((ask + shown, json.dumps(shown_facts)),),
        )
        examples.append(example)
    return Task(name="json", examples=examples, grade=_grade, max_new_tokens=128)


def _person(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, str]]:
    name, city, trade = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TRADES)
    age, married = rng.randint(21, 67), rng.random() < 0.5
    state = "married" if married else "not married"
    text = f"{name}, {age} years old, works as a {trade} in {city} and is {state}."
    facts = {"name": name, "age": age, "job": trade, "city": city, "married": married}
    return text, facts, {"name": "string", "age": "integer", "job": "string", "city": "string", "married": "boolean"}


def _order(rng: random.Random) -> tuple[str, dict[str, Any], dict[str, str]]:
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    items, price = rng.sample(GOODS, rng.randint(2, 3)), rng.randint(20, 900) + rng.choice((0.5, 0.25, 0.75))
    number = rng.randint(1000, 9999)
    listed = ", a ".join(items[:-1]) + " and a " + items[-1]
    text = f"Order {number}: {name} bought a {listed} for {price:.2f} dollars in all, to be sent to {city}."
    facts = {"order": number, "customer": name, "items": items, "total": price, "city": city}
    return (
        text,
        facts,
        {"order": "integer", "customer": "string", "items": "array", "total": "number", "city": "string"},
    )


def _property(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}} if kind == "array" else {"type": kind}


def first_object(text: str) -> Any:
    """The first JSON object in a text, whatever stands around it; None if there is none."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]
        except (json.JSONDecodeError, RecursionError):
            start = text.find("{", start + 1)
    return None


def schema_fault(value: Any, schema: dict[str, Any]) -> str | None:
    """What is wrong with a flat object by its schema; None for nothing."""
    if not isinstance(value, dict):
        return "no JSON object"
    for name in schema["required"]:
        if name not in value:
            return f"{name} is missing"
    for name, entry in value.items():
        kind = schema["properties"].get(name)
        if kind is None:
            return f"{name[:40]} is not in the schema"
        # JSON's true is no number, though Python's is
        if not isinstance(entry, TYPES[kind["type"]]) or (isinstance(entry, bool) and kind["type"] != "boolean"):
            return f"{name} is not of type {kind['type']}"
        if isinstance(entry, list) and not all(isinstance(e, str) for e in entry):
            return f"{name} holds something else than strings"
    return None


def _grade(example: Example, answer: str) -> Grade:
    value = first_object(answer)
    fault = schema_fault(value, example.reference["schema"])
    facts = example.reference["facts"]
    right = sum(_same(value.get(name), fact) for name, fact in facts.items()) if isinstance(value, dict) else 0
    parts = {"valid": float(fault is None), "fields": right / len(facts)}
    note = fault or ("" if right == len(facts) else f"{right} of {len(facts)} fields right")
    return Grade(score=float(fault is None and right == len(facts)), parts=parts, note=note)


def _same(found: Any, fact: Any) -> bool:
    if isinstance(fact, str):
        return isinstance(found, str) and found.strip().lower() == fact.lower()
    if isinstance(fact, list):
        return isinstance(found, list) and list(map(_plain, found)) == fact
    return type(found) in (int, float, bool) and isinstance(found, bool) == isinstance(fact, bool) and found == fact


def _plain(entry: Any) -> str:
    return str(entry).strip().lower()

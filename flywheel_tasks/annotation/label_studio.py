"""Label Studio (Sec. 2.2.2's annotation interface): a page for each mode, tasks for it, and its answers as reviews.

Nothing here talks to a server (`label_studio_server` does). Every text stands in a tag that shows text, never markup;
the page is built as XML, so no question's wording can break out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as Xml

from flywheel_tasks.annotation.contract import Character, Question, Response, Said, Shown, Task, digest
from flywheel_tasks.core.schemas import MODES

SIDES = ("left", "right")
SERVER = "label_studio"
"""In a task's data: the server that it was put on, where `label_studio_server` did that."""
_PREFERENCE = (
    ("left", "Left"), ("right", "Right"), ("tie", "No difference"), ("neither", "Both fail"),
)  # fmt: skip
_STRENGTH = (("1", "slightly"), ("2", "clearly"), ("3", "much"))
_STYLE = """
.fw {max-width: 1180px; margin: 0 auto; padding: 8px}
.fw-card, .fw-box, .fw-ask {border: 1px solid #d8d8e0; border-radius: 10px; padding: 10px 16px; margin: 8px 0}
.fw-card {background: #f7f7fb}
.fw-card h4, .fw-box h4, .fw-q h4 {font-size: 13px; font-weight: 500; line-height: 1.4; margin: 10px 0 2px !important}
.fw-card h4 {color: #6a6a75}
.fw-mark {background: #fff3c4; border-left: 4px solid #d9a400; padding: 2px 12px 8px; margin-top: 8px}
.fw-two {display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 16px}
.fw-said {font-size: 16px; line-height: 1.5; border-bottom: 1px solid #ececf2; padding-bottom: 8px}
.fw-box [class*='dialoguetext'] {white-space: pre-wrap}
.fw-box [class*='wrapper_header'], .fw-box [class*='time--'], .fw-box [class*='selectAllBtn'] {display: none}
"""
_GUIDE = {
    "static": "Read the character and the conversation. Judge the two last replies.",
    "interactive": "You are the person in this conversation. Judge the two replies, then write what you say next.",
    "steerability": "Mildly challenge the character: do the replies keep to the highlighted traits and instructions? "
    "If both fail, write the reply that should have come. Then write what you say next.",
    "image": "A reply may make an image. Judge the moment and the image's description, then the two replies.",
}


def export(tasks: Sequence[Task]) -> dict[str, bytes]:
    """The files of a Label Studio project for every mode that has tasks."""
    files = {}
    for mode in MODES:
        mine = [task for task in tasks if task.mode == mode]
        if mine:
            files[f"label_studio/{mode}.xml"] = page(mode, mine[0].questions).encode()
            rows = [{"data": data(task)} for task in mine]
            files[f"label_studio/{mode}.json"] = json.dumps(rows, ensure_ascii=False, indent=0).encode()
    return files


def page(mode: str, questions: Iterable[Question]) -> str:
    """The labelling configuration of one mode."""
    asked = list(questions)
    view = Xml.Element("View", className="fw")
    Xml.SubElement(view, "Style").text = _STYLE
    Xml.SubElement(view, "Header", value=_GUIDE[mode], size="4")
    card = Xml.SubElement(view, "View", className="fw-card")
    Xml.SubElement(card, "Header", value="$name", size="3")
    _titled(card, "description", "Who")
    held_to = Xml.SubElement(card, "View", className="fw-mark") if mode == "steerability" else card
    _titled(held_to, "traits_line", "Traits")
    _titled(held_to, "instructions", "Instructions")
    box = Xml.SubElement(view, "View", className="fw-box")
    Xml.SubElement(box, "Header", value="Conversation", size="6")
    Xml.SubElement(box, "Paragraphs", name="history", value="$history", layout="dialogue", nameKey="speaker",
                   textKey="content")  # fmt: skip
    two = Xml.SubElement(view, "View", className="fw-two")
    for side in SIDES:
        _side(Xml.SubElement(two, "View", className="fw-box"), side, mode, asked)
    ask = Xml.SubElement(view, "View", className="fw-ask")
    Xml.SubElement(ask, "Header", value="Which reply is more engaging?", size="5")
    _choices(ask, "preferred", _PREFERENCE, required=True)
    hidden = {"visibleWhen": "choice-selected", "whenTagName": "preferred", "whenChoiceValue": "Left,Right"}
    _choices(Xml.SubElement(ask, "View", hidden), "strength", _STRENGTH)
    for question in (q for q in asked if q.about == "pair"):
        _question(ask, question, "pair", "left")
    _text_area(ask, "rewrite", "If neither is good enough: your rewrite", "the reply as it should have been")
    if mode in ("interactive", "steerability"):
        _text_area(ask, "next_message", "What do you say next?", "your next message (empty: the conversation ends)")
    Xml.indent(view)
    return Xml.tostring(view, encoding="unicode")


def data(task: Task) -> dict[str, Any]:
    """A task's data: what is on the page, and the keys to find it again."""
    shown = task.shown
    history = [
        {"speaker": "Person" if said.role == "user" else shown.character.name, **said.model_dump()}
        for said in shown.history
    ]
    return {
        "task_id": task.task_id,
        "digest": task.digest,
        "mode": task.mode,
        "reviewers": task.reviewers,
        **shown.character.model_dump(mode="json"),
        "traits_line": _line(shown.character.traits),
        "history": history,
        **{side: getattr(shown, side).text for side in SIDES},
        **{f"{side}_tool_call": getattr(shown, side).tool_call for side in SIDES},
        **{f"{side}_image": _image(getattr(shown, side).tool_call) for side in SIDES},
    }


def reviews(exported: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Label Studio's JSON export as lines of our contract, not validated yet: one for each submitted annotation.

    What it says was on the page is compared with the task by its digest, so a text altered on the server is refused."""
    for task in exported:
        found, on_page = task["data"], shown(task["data"])
        for annotation in task["annotations"]:
            if annotation.get("was_cancelled"):
                continue
            who = annotation["completed_by"]
            number = who["id"] if isinstance(who, dict) else who
            line = _answers(annotation["result"])
            yield line | {
                "task_id": found["task_id"],
                "digest": digest(on_page),
                # Every kind of export has the person's number; it is the server's own, so it goes with the server.
                "annotator": "-".join(["label-studio", *([found[SERVER]] if found.get(SERVER) else []), str(number)]),
                "seconds": annotation.get("lead_time"),
                "at": annotation.get("updated_at") or annotation["created_at"],
            }


def shown(found: Mapping[str, Any]) -> Shown:
    """What a task's data put on the page."""
    traits = tuple(found["traits"]) if found["traits_line"] == _line(found["traits"]) else (found["traits_line"],)
    return Shown(
        character=Character(
            name=found["name"],
            description=found["description"],
            traits=traits,
            instructions=found["instructions"],
        ),
        history=tuple(Said(role=said["role"], content=said["content"]) for said in found["history"]),
        **{side: Response(text=found[side], tool_call=_call(found, side)) for side in SIDES},
    )


def _image(call: str | None) -> str:
    """A tool call in words: what is asked for, and of which tool."""
    if call is None:
        return "(none)"
    wanted = json.loads(call)
    words = [f"{name}: {value}" for name, value in sorted(wanted["arguments"].items())]
    return "\n".join([wanted["name"], *words])


def _call(found: Mapping[str, Any], side: str) -> str | None:
    """The call that was shown; words that are not the call's own stand for themselves, so that their digest differs."""
    call: str | None = found[f"{side}_tool_call"]
    words = str(found[f"{side}_image"])
    return call if words == _image(call) else words


def _answers(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {"contract": "flywheel.annotation/1"}
    answers = []
    for result in results:
        name, value = result["from_name"], result["value"]
        if result["type"] == "textarea":
            line[name] = "\n".join(value["text"]) if isinstance(value["text"], list) else value["text"]
        elif result["type"] == "choices":
            choice = value["choices"][0]
            if name == "preferred":
                line[name] = choice
            elif name == "strength":
                line[name] = int(choice)
            else:
                question, _, about = name.rpartition("__")
                answers.append({"question": question, "about": about, "answer": choice})
    return line | {"answers": answers}


def _side(box: Xml.Element, side: str, mode: str, questions: Iterable[Question]) -> None:
    Xml.SubElement(box, "Header", value=side.capitalize(), size="4")
    Xml.SubElement(Xml.SubElement(box, "View", className="fw-said"), "Text", name=side, value=f"${side}")
    if mode == "image":
        _titled(box, f"{side}_image", "Image it makes")
    for question in (q for q in questions if q.about == "response"):
        _question(box, question, side, side)


def _titled(parent: Xml.Element, name: str, title: str) -> None:
    Xml.SubElement(parent, "Header", value=title, size="6")
    Xml.SubElement(parent, "Text", name=name, value=f"${name}")


def _question(parent: Xml.Element, question: Question, about: str, text: str) -> None:
    view = Xml.SubElement(parent, "View", className="fw-q")
    Xml.SubElement(view, "Header", value=question.text, size="6")
    answers = [(answer, _words(answer)) for answer in question.answers]
    _choices(view, f"{question.name}__{about}", answers, text, required=question.required)


def _choices(
    parent: Xml.Element, name: str, choices: Iterable[tuple[str, str]], about: str = "left", required: bool = False
) -> None:
    tag = Xml.SubElement(
        parent, "Choices", name=name, toName=about, choice="single-radio", showInline="true",
        required=str(required).lower(), requiredMessage=f"Please answer: {_words(name.partition('__')[0])}",
    )  # fmt: skip
    for alias, words in choices:
        Xml.SubElement(tag, "Choice", value=words, alias=alias)


def _text_area(parent: Xml.Element, name: str, title: str, placeholder: str) -> None:
    view = Xml.SubElement(parent, "View", className="fw-q")
    Xml.SubElement(view, "Header", value=title, size="6")
    Xml.SubElement(
        view, "TextArea", name=name, toName="left", rows="3", editable="true", maxSubmissions="1",
        placeholder=placeholder, showSubmitButton="false",
    )  # fmt: skip


def _words(name: str) -> str:
    return name.replace("_", " ")


def _line(traits: Iterable[str]) -> str:
    return ", ".join(traits)

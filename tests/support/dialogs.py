"""Dialogs that are hard to spell, and a prompt template of one's own."""

CUSTOM = {
    "system": "Rôle « {content} »\n",
    "user": 'Q "{content}" {{ x }} {% y %} 🙂\n',
    "assistant": "A\\n: {content} END",
}
DIALOGS = {
    "one question": [("user", "Hello")],
    "several turns": [
        ("user", "Hello"),
        ("assistant", "Hi there!"),
        ("user", "And?"),
        ("assistant", "No."),
        ("user", "x"),
    ],
    "system": [("system", "You are kind."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "Go on.")],
    "closed": [("user", "2 + 2?"), ("assistant", "4")],
    "empty answer": [("user", "a"), ("assistant", ""), ("user", "b")],
    "empty system": [("system", ""), ("user", "a")],
    "whitespace": [
        *(("system", "\n two  spaces \t"), ("user", "a  b\n\n\tc \u00a0 \n"), ("assistant", "x\r\n  y\n\n")),
        ("user", "z   "),
    ],
    "unicode": [("user", "Où? 漢字 🙂 e\u0301 \u200b ﬁ"), ("assistant", "Là-bas ½ 👩‍👩‍👧"), ("user", "ß ÿ \ufeff")],
    "looks like Jinja": [("user", "{{ messages }} {% raw %} {# no #} \\n 'quoted' \"twice\""), ("assistant", "}} %}")],
}


def messages_of(dialog):
    return [{"role": role, "content": content} for role, content in dialog]

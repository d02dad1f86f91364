"""Twenty sentences of different lengths and scripts, so that every part of the tokenizer's tables is read."""

SENTENCES = [
    "The cat sat on the mat.",
    "A read that begins at the end of a file returns nothing.",
    "Weights are encrypted before they leave the machine that trained them.",
    "Ein kurzer Satz auf Deutsch mit Umlauten: äöü ß.",
    "Une phrase en français, avec des accents : é è ê ç.",
    "これは日本語の文です。",
    "Это предложение на русском языке.",
    "هذه جملة باللغة العربية.",
    "12345 67890 3.14159 -273.15 1e-9",
    "https://example.org/a/very/long/path?with=query&and=more#fragment",
    "def main():\n    return {'a': [1, 2, 3]}",
    "UPPER lower MiXeD",
    "",
    " ",
    "🙂 emoji 🚀 in 🌍 between",
    "word " * 200,
    "antidisestablishmentarianism floccinaucinihilipilification",
    "Two sentences stand here. The second one is about tomatoes.",
    "What is the capital of France?",
    "Paris is the capital of France.",
]

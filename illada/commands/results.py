"""What a command prints when it is done."""

import json


def print_result(result: dict, output, as_json: bool):
    if not as_json:
        print(result["text"])
        return
    figures = {
        "num_forward_passes": int(output.num_forward_passes[0]),
        "tokens_per_forward": round(float(output.tokens_per_forward[0]), 3),
    }
    print(json.dumps(result | figures, ensure_ascii=False))

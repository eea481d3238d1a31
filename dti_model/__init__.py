"""Train click models from language models with Dynamic Target Isolation: data, prompts, driver, scores."""

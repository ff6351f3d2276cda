"""How far steps of the residual stream really move the next token, beside what the matrices predict."""

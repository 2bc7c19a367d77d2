"""Can a rule that sees no judge say when a person is learned?"""

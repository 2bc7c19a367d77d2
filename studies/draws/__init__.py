"""Do stratified times and antithetic noise help when a person is learned from crops?"""

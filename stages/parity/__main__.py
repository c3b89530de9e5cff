from stages.parity import main

if __name__ == "__main__":
    main()
